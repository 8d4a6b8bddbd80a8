"""The vocabulary: flat parameters, the codec interface, messages, random streams. No Lightning here."""
