"""Checkpoints: the folder protocol, leases, ZeRO's files, universal checkpoints, copies in object storage."""
