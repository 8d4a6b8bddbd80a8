"""What the command line needs before torch and Lightning: shipped configurations, names, checks of arguments, the state of the machine."""
