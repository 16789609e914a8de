"""The typed configuration: schema, files and overrides, checks, DeepSpeed's dictionary."""
