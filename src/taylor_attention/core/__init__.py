"""The mathematics: monomial basis, power series, exact costs, moments and the state."""
