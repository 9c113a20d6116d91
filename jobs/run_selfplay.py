"""For `ray job submit`: rounds of self-play, and all else of a run. Arguments: as `run_pipeline.py`."""

from prefsel.cli import job

if __name__ == "__main__":
    job("run")
