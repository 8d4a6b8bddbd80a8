"""`fedlight compare`: codecs over seeds on one data set and model, and what they cost. The runs themselves are the command line's."""
