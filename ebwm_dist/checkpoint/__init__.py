"""Checkpoints: folder protocol, leases, content of ZeRO's files, universal checkpoints, mirrors in object storage."""
