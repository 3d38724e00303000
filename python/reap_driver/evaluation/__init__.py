"""How closely a pruned model follows its original."""
