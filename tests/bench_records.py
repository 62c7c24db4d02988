"""Invented records of the benchmark suite, for the tests of what is made of them."""

MACHINE = {"processor": "Example CPU, 2 cores", "threads": "2", "torch": "2.13.0", "commit": "0" * 40}


def seconds(median: float, reach: float = 0.0, rounds: int = 9) -> dict:
    """A time whose 95 % interval reaches so far to both sides, as a share of it."""
    ends = {"low": median * (1 - reach), "high": median * (1 + reach)}
    return {"median": median, "iqr": 0.0, "min": ends["low"], "mean": median, "stddev": 0.0, "rounds": rounds} | ends


def ratio(median: float, reach: float = 0.0, rounds: int = 9, **more) -> dict:
    return {"median": median, "low": median * (1 - reach), "high": median * (1 + reach), "rounds": rounds, **more}


def record(name: str, median: float = 1.0, *, group: str = "loss", reach: float = 0.0, **more) -> dict:
    return {"name": name, "group": group, "seconds": seconds(median, reach)} | more


def content(*records: dict, scale: str = "laptop", **machine) -> dict:
    return {"scale": scale, "machine": MACHINE | machine, "records": list(records)}
