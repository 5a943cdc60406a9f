"""`ma-cluster bench`: how fast the networks run on this machine, beside what a user would otherwise run."""
