"""Forwards log records of this project to the logger of the current MMEngine run."""

import logging

from mmengine.logging import print_log


class _ToCurrentRun(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        print_log(record.getMessage(), logger="current", level=record.levelno)


def forward_logs() -> None:
    """Send the records of ``backbones`` and ``dense`` (load reports, say) to MMEngine's logger."""
    for name in ("backbones", "dense"):
        logger = logging.getLogger(name)
        if not any(isinstance(handler, _ToCurrentRun) for handler in logger.handlers):
            logger.addHandler(_ToCurrentRun())
        if logger.level == logging.NOTSET:
            logger.setLevel(logging.INFO)
