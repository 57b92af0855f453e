"""A run on one page: what grew, when, and what it did to the loss. Needs nothing but the standard library."""

from auxin.report.page import render_report, write_report

__all__ = ["render_report", "write_report"]
