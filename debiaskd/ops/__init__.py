"""The ops: one module each, with formula, eager oracle, autograd and the public function."""
