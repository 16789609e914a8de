"""The order of samples: permutations, mixtures, damaged samples, the resumable stream."""
