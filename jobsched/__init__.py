"""jobsched: a GPU-aware scheduler for ML training jobs."""

__version__ = "0.1.0"
