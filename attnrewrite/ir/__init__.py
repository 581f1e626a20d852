"""What was recognized, as data, and the contract between recognizers, targets and the rest."""
