"""Helpers that every folder may use and that know no model: errors, wording, files, the machine,
progress reports.
"""
