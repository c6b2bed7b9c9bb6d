"""What every folder may use and that knows no tensor of a model: errors, words, files, the machine,
progress.
"""
