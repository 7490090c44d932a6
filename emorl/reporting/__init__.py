"""Reporting: tables, figures and one HTML report from finished run directories."""
