"""For `ray job submit`: a refresh. Arguments: --config FILE --workspace URI [--train] [--set dotted.key=value]..."""

from prefsel.cli import job

if __name__ == "__main__":
    job("refresh")
