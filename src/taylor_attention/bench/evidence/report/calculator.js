"use strict";
// What core/cost.py and core/series.py compute, for the page. No document is needed here. Integers are BigInt, as exact
// as Python's; what is asked comes as numbers, and null where it is left to its default.

const BYTES = { float16: 2n, bfloat16: 2n, float32: 4n, float64: 8n };
const LARGEST = 1e15; // of what is asked: exact as a number
const STEPS = 4000;

function expectInteger(name, value, lowest) {
  if (!Number.isInteger(value) || value < lowest) throw new Error(`${name}: expected an int >= ${lowest}, got ${value}`);
  if (value > LARGEST) throw new Error(`${name}: expected at most ${LARGEST}, got ${value}`);
}

function complete(asked) {
  const full = { ...asked };
  for (const name of ["layers", "heads", "head_dim"]) expectInteger(name, full[name], 1);
  full.kv_heads ??= full.heads;
  full.value_dim ??= full.head_dim;
  full.cache_dtype ??= full.dtype;
  for (const name of ["kv_heads", "value_dim"]) expectInteger(name, full[name], 1);
  for (const name of ["context", "window", "sinks", "heavy"]) expectInteger(name, full[name], 0);
  if (full.heads % full.kv_heads) {
    throw new Error(`kv_heads: expected a divisor of heads = ${full.heads}, got ${full.kv_heads}`);
  }
  if (full.heavy && !full.window) {
    throw new Error(`heavy: expected 0 without a window, in which a token shows its weight, got ${full.heavy}`);
  }
  if (full.degree !== null) expectInteger("degree", full.degree, 0);
  else if (!full.window && !full.sinks) {
    throw new Error("degree: expected an int >= 0 (None: only with a window or sinks), got None");
  }
  return full;
}

function binomial(n, k) {
  let value = 1n;
  for (let i = 1n; i <= k; i++) value = (value * (n - k + i)) / i;
  return value;
}

function divideUp(a, b) {
  return (a + b - 1n) / b;
}

// Equations 13 and 15, as in core/cost.py: what attention costs beside a key/value cache.
function plan(asked) {
  const full = complete(asked);
  const far = full.degree !== null;
  const [layers, heads, kvHeads, d, e] = ["layers", "heads", "kv_heads", "head_dim", "value_dim"].map((name) => BigInt(full[name]));
  const degree = BigInt(far ? full.degree : 0);
  const exact = BigInt(full.window) + BigInt(full.sinks) + BigInt(full.heavy);
  const monomials = far ? binomial(d + degree, degree) : 0n;
  const lower = far && degree > 0n ? binomial(d + degree, degree - 1n) : 0n;
  const elements = kvHeads * ((e + 1n) * monomials + exact * (d + e));
  const cached = kvHeads * (d + e); // elements of one token
  const update = (2n * e + 1n) * monomials + (degree + 1n) * monomials - lower; // a read costs the same
  const softmax = heads * (2n * d + 2n * e + 3n); // FLOPs for one cached token
  const flops = (kvHeads + heads) * update + exact * softmax;
  const [size, cacheSize, context] = [BYTES[full.dtype], BYTES[full.cache_dtype], BigInt(full.context)];
  return {
    state_elements: layers * elements,
    state_bytes_per_layer: elements * size,
    state_bytes: layers * elements * size,
    cache_bytes_per_layer: context * cached * cacheSize,
    cache_bytes: layers * context * cached * cacheSize,
    flops_per_token: layers * flops,
    cache_flops_per_token: layers * context * softmax,
    break_even_memory: divideUp(elements * size, cached * cacheSize),
    break_even_flops: divideUp(flops, softmax),
  };
}

// The relative error of the weights of scores ~ N(mean, std^2), Taylor's series about 0: the sum of core/series.py.
function taylorError(std, degree, mean) {
  const coefficients = [1];
  for (let p = 1; p <= degree; p++) coefficients.push(coefficients[p - 1] / p);
  const low = -12 - 2 * std;
  const width = (12 - low) / STEPS;
  let total = 0;
  for (let i = 0; i <= STEPS; i++) {
    const z = low + i * width;
    const s = mean + 2 * std * std + std * z;
    const value = coefficients.reduceRight((sum, coefficient) => sum * s + coefficient, 0);
    total += (Math.exp((-z * z) / 4) - value * Math.exp(-s - (z * z) / 4)) ** 2;
  }
  return Math.sqrt((total * width) / Math.sqrt(2 * Math.PI));
}

// The same, of the polynomial fitted to the scores: sqrt(Pr[Poisson(std^2) > degree]), whatever their mean.
function fittedError(std, degree) {
  const rate = std * std;
  let term = Math.exp(-rate);
  for (let p = 1; p <= degree; p++) term *= rate / p;
  let total = 0;
  for (let p = degree + 1; p <= degree + 1 + 2 * rate || term > 1e-17 * total; p++) {
    term *= rate / p;
    total += term;
  }
  return Math.sqrt(total);
}

// What this file computes otherwise than Python did, as sentences; none if all is well.
function findDifferences(golden) {
  const found = [];
  for (const { asked, found: wanted } of golden.plans) {
    const made = plan(asked);
    for (const name of Object.keys(wanted)) {
      if (String(made[name]) !== wanted[name]) found.push(`${name}: ${made[name]} here, ${wanted[name]} in Python`);
    }
  }
  for (const { std, degree, mean, taylor, fitted } of golden.errors) {
    const pairs = [[taylorError(std, degree, mean), taylor], [fittedError(std, degree), fitted]];
    for (const [here, there] of pairs) {
      const close = Math.abs(here - there) <= 1e-6 * Math.abs(there) + 1e-9;
      if (!close) found.push(`error at spread ${std}, degree ${degree}: ${here} here, ${there} in Python`);
    }
  }
  return found;
}
