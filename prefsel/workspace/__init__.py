"""What every stage stands on: storage, ledgers, recipes, the catalog of the corpus."""
