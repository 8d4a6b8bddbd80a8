"""`python -m fedlight`, where the command `fedlight` is not on the path."""

from fedlight.usage import main

if __name__ == "__main__":
    main()
