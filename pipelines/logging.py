"""How a headless run prints its progress: one short line a message. Not here: what is logged."""

import logging
import sys

import dagster as dg


class _Plain(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        meta = getattr(record, "dagster_meta", None) or {}
        message = meta.get("orig_message") or record.getMessage()
        step = meta.get("step_key") or ""
        named = message.startswith((step, step.replace("_", " "))) if step else True
        text = message if named else f"{step}: {message}"
        level = "" if record.levelno == logging.INFO else f"{record.levelname} "
        return f"{self.formatTime(record, '%H:%M:%S')} {level}{text}"


@dg.logger(config_schema={"log_level": dg.Field(str, default_value="INFO")}, description="One short line a message.")
def plain_console(init_context: dg.InitLoggerContext) -> logging.Logger:
    """Messages of INFO and above as `HH:MM:SS step: message`."""
    logger = logging.Logger("scope_atlas", level=init_context.logger_config["log_level"].upper())
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(_Plain())
    logger.addHandler(handler)
    return logger
