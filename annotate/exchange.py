"""`puna annotate export` and `puna annotate import`: comparisons out of their file and into it."""

from puna.annotate.config import ExportConfig, ImportConfig
from puna.core.checkpoint.atomic import check_absent, write_text
from puna.core.documents import count_of
from puna.core.terminal import say
from puna.trainers.annotations import exchange
from puna.trainers.annotations.store import opened


def export(config: ExportConfig) -> None:
    """Write the comparisons; raises ValueError where there are none, or a file of that name."""
    check_absent(config.out)
    with opened(config.annotations) as store:
        text = exchange.written(store, config.format, config.batch or None)
        count = len(exchange.verdicts(store, config.batch or None))
    if not count:
        raise ValueError(f"there is no comparison to write in {config.annotations} yet")
    write_text(config.out, text)
    say(f"wrote {config.out}: {count_of(count, 'comparison')}")


def bring(config: ImportConfig) -> None:
    """Read all files, then add what is new."""
    read = [exchange.read(path, config.format, config) for path in config.data]
    with opened(config.annotations, create=True) as store:
        for path, (rows, skipped) in zip(config.data, read, strict=True):
            new = exchange.bring_in(store, rows)
            different = len({exchange.source_of(row) for row in rows})
            again = len(rows) - different
            twice = f"; more than once in the file: {again:,}" if again else ""
            before = f"there before: {different - new:,}"
            say(f"{path}: {count_of(new, 'new comparison')}; {before}{twice}")
            if skipped:
                say(str(skipped))
