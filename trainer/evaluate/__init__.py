"""What an encoder has learnt, from one pass of features: kNN, linear probe, rank, corruptions."""
