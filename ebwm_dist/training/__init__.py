"""The trainer, the engine around DeepSpeed, optimizer, checkpointing, metrics, signals, watchdog, dry run."""
