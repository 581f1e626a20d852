"""What was recognised, as data, and the contract between recognisers, targets and the rest."""
