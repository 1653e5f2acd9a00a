class UserError(Exception):
    """Something the user can put right. The message is one line: what is wrong, where, what to do."""
