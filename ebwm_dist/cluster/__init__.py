"""Runs on a Ray cluster: submitted as jobs, trained by worker groups, restarted when workers or nodes are lost.

`jobs.py` talks to a cluster from outside. Inside, `python -m ebwm_dist.cluster` runs the driver (`driver.py`): it waits
for nodes (`capacity.py`), starts a worker group on them (`group.py`), each worker of which trains as
`launchers/train.py` does (`worker.py`), and decides what follows when that ends (`recovery.py`).
"""
