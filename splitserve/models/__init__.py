"""Model families: one declarative file each over shared layers."""
