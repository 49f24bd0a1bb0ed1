"use strict";
// The calculator's form: reads it, shows what calculator.js finds, and whether that agrees with Python.

(() => {
  const form = document.querySelector("#calculator form");
  const complaint = document.querySelector("#complaint");
  const places = [...document.querySelectorAll("#calculator [data-show]")];
  const texts = new Set(["dtype", "cache_dtype"]);

  function read() {
    const asked = {};
    for (const field of form.elements) {
      if (!field.checkValidity()) throw new Error(`${field.name}: ${field.validationMessage}`);
      asked[field.name] = field.value === "" ? null : texts.has(field.name) ? field.value : Number(field.value);
    }
    return asked;
  }

  function size(bytes) {
    const units = ["B", "kB", "MB", "GB", "TB", "PB", "EB"];
    let amount = Number(bytes);
    while (amount >= 999.5 && units.length > 1) {
      amount /= 1000;
      units.shift();
    }
    return `${Number(amount.toPrecision(3)).toLocaleString("en")} ${units[0]}`;
  }

  const count = (value) => (value < 10n ** 15n ? value.toLocaleString("en") : Number(value).toExponential(2));
  const ratio = (theirs, ours) => Number((Number(theirs) / Number(ours)).toPrecision(3)).toLocaleString("en");
  const tokens = (value) => `${count(value)} tokens on`;

  function share(error) {
    if (error === null) return "no far part";
    const percent = 100 * error;
    return percent >= 1000 || (percent < 0.01 && percent > 0) ? error.toExponential(1) : `${Number(percent.toPrecision(2))}%`;
  }

  function describe(asked) {
    const made = plan(asked);
    const far = asked.degree !== null;
    return {
      state_bytes: size(made.state_bytes),
      cache_bytes: size(made.cache_bytes),
      memory_ratio: ratio(made.cache_bytes, made.state_bytes),
      state_bytes_per_layer: size(made.state_bytes_per_layer),
      cache_bytes_per_layer: size(made.cache_bytes_per_layer),
      flops_per_token: count(made.flops_per_token),
      cache_flops_per_token: count(made.cache_flops_per_token),
      flops_ratio: ratio(made.cache_flops_per_token, made.flops_per_token),
      break_even_memory: tokens(made.break_even_memory),
      break_even_flops: tokens(made.break_even_flops),
      taylor: share(far ? taylorError(asked.std, asked.degree, asked.mean) : null),
      fitted: share(far ? fittedError(asked.std, asked.degree) : null),
    };
  }

  function show() {
    let shown = {};
    complaint.hidden = true;
    try {
      shown = describe(read());
    } catch (error) {
      complaint.hidden = false;
      complaint.textContent = error.message;
    }
    for (const place of places) place.textContent = shown[place.dataset.show] ?? "–";
  }

  const golden = JSON.parse(document.querySelector("#golden").textContent);
  const differences = findDifferences(golden);
  const status = document.querySelector("#self-check");
  status.classList.toggle("warning", differences.length > 0);
  status.textContent = differences.length
    ? `Do not trust this calculator: it differs from the library (${differences[0]}).`
    : `Checked against the library: ${golden.plans.length} models and ${golden.errors.length} errors agree.`;
  form.addEventListener("input", show);
  form.addEventListener("submit", (event) => event.preventDefault());
  show();
})();
