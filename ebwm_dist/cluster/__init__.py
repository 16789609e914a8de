"""Runs on a Ray cluster: submitted as jobs, trained by worker groups, restarted when workers or nodes are lost.

`jobs.py` submits and controls jobs from outside. Inside, `python -m ebwm_dist.cluster` runs the driver (`driver.py`):
it waits for nodes (`capacity.py`), starts a worker group on them (`group.py`) whose workers train as
`launchers/train.py` does (`worker.py`), and restarts it after failures (`recovery.py`).
"""
