"""Records and reports: ``report.json`` and the page that is made from it alone."""

from unbackdoor.report.html import render
from unbackdoor.report.record import Report

__all__ = ["Report", "render"]
