"""For `ray job submit`: evaluation. Arguments: --config FILE --workspace URI [--set dotted.key=value]..."""

from prefsel.cli import job

if __name__ == "__main__":
    job("evaluate")
