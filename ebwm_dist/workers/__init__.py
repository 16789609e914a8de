"""Work on other processes: executors, and a pool of Ray actors."""
