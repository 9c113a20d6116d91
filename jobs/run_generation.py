"""For `ray job submit`: answers of models to prompts. Arguments: as `run_pipeline.py`."""

from prefsel.cli import job

if __name__ == "__main__":
    job("generate")
