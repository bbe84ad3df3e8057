"""What several test files share."""
import gzip
import json
import os


def write_gz(path, data):
    """JSON, gzipped, with NaN as RxR's files hold it."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as f:
        json.dump(data, f)
