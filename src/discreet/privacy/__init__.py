"""Public arithmetic: plans, sampling, accounting, ledger and certificate. No example or parameter enters here."""
