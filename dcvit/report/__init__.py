"""Reports: one HTML file that shows how a compression was done and how it went, without scripts or requests."""

from dcvit.report.family import FamilyPoint, family_page, saved_family_page
from dcvit.report.page import Page
from dcvit.report.run import run_page, write_page, write_report

__all__ = ["FamilyPoint", "Page", "family_page", "run_page", "saved_family_page", "write_page", "write_report"]
