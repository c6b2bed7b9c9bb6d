"""What must be known of other people's models: where their blocks are, how they load, how their
stream turns.
"""
