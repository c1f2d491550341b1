"""Whether progress bars are drawn. Imports the standard library and tqdm."""

import sys


def bars_are_seen() -> bool:
    """Whether standard error is a terminal, or this is a notebook. A log file would fill with a bar's carriage returns."""
    from tqdm.auto import tqdm
    from tqdm.notebook import tqdm_notebook

    return sys.stderr.isatty() or issubclass(tqdm, tqdm_notebook)
