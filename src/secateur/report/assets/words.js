// How numbers and names are written; joined to the scripts that need it, so that none of these names is global.

// Thousands are parted by commas.
function amount(number) {
  return number.toLocaleString("en");
}

// A number of per cent with two places; very small ones keep two digits.
function percent(value) {
  if (!Number.isFinite(value)) return "unknown";
  return `${value > 0 && value < 0.01 ? value.toPrecision(2) : value.toFixed(2)} %`;
}

// A name with its middle left out when it is long: the end of a name tells most.
function shorten(text, width = 40) {
  if (text.length <= width) return text;
  const head = Math.floor(((width - 1) * 2) / 5);
  return `${text.slice(0, head)}…${text.slice(text.length - (width - 1 - head))}`;
}
