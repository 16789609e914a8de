"""The order samples are read in: permutations, mixtures, damaged samples, the resumable stream."""
