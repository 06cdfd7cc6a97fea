"""When a run has converged: the machine over loss windows, its phases and rules, and recorded curves replayed."""
