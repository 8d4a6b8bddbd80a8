"""`fedlight compare`: codecs over seeds on one data set and model, and what they cost. The command line does the runs."""
