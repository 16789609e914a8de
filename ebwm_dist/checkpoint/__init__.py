"""Checkpoints: the folder protocol, leases, ZeRO's files, copies in object storage."""
