"""The vocabulary: flat parameters, the codec interface, messages, random streams. It does not import Lightning."""
