// Numbers as people read them, in the units of the command line: sizes in powers of 1024 (64K, 1.43G), times in ms.

const UNITS = [["E", 60], ["P", 50], ["T", 40], ["G", 30], ["M", 20], ["K", 10]];

/** Three digits of a number that is at least 1, cut off as the command line does it. */
function threeDigits(number) {
  if (number < 10) return (Math.floor(number * 100) / 100).toFixed(2);
  if (number < 100) return (Math.floor(number * 10) / 10).toFixed(1);
  return String(Math.floor(number));
}

/** Bytes: exactly with the largest unit that divides them, else three digits. */
export function size(bytes) {
  for (const [name, shift] of UNITS) {
    const unit = 2 ** shift;
    if (bytes !== 0 && bytes % unit === 0 && bytes / unit < 10000) return bytes / unit + name;
  }
  return roughly(bytes);
}

/** Bytes to three digits. */
function roughly(bytes) {
  for (const [name, shift] of UNITS) {
    if (bytes >= 2 ** shift) return threeDigits(bytes / 2 ** shift) + name;
  }
  return String(Math.round(bytes));
}

/** Bytes per second. */
export function rate(bytes) {
  return roughly(bytes) + "/s";
}

/** A number, in groups of three digits. */
export function count(number) {
  return String(Math.round(number)).replace(/\B(?=(\d{3})+$)/g, "\u202f");
}

/** So many per second. */
export function perSecond(number) {
  if (number > 0 && number < 0.05) return "<0.1/s";
  return (number > 0 && number < 9.95 ? number.toFixed(1) : count(number)) + "/s";
}

/** Milliseconds; a dash if there is no value. */
export function ms(value) {
  if (value === null || value === undefined) return "–";
  if (value >= 9995) return (value / 1000).toFixed(0) + " s";
  if (value >= 999.5) return (value / 1000).toFixed(1) + " s";
  if (value >= 9.95) return value.toFixed(0) + " ms";
  return (value >= 0.995 ? value.toFixed(1) : value.toFixed(2)) + " ms";
}

/** A part of a whole, to a tenth of a percent, never rounded up to all of it. */
export function percent(part, whole) {
  if (!(whole > 0)) return "–";
  return (Math.floor((part / whole) * 1000) / 10).toFixed(1) + " %";
}

/** A length of time in seconds, to two units. */
export function ago(seconds) {
  const whole = Math.max(0, Math.floor(seconds));
  if (whole < 60) return whole + " s";
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${whole % 60} s`;
  if (whole < 86400) return `${Math.floor(whole / 3600)} h ${Math.floor(whole / 60) % 60} min`;
  return `${Math.floor(whole / 86400)} d ${Math.floor(whole / 3600) % 24} h`;
}

/** The time of day of a number of seconds since 1970. */
export function clock(seconds) {
  return new Date(seconds * 1000).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", second: "2-digit", hour12: false });
}

/** At most so many characters of a text, the middle left out. */
export function shorten(text, most) {
  const letters = [...text];
  if (letters.length <= most) return text;
  const tail = Math.floor((most - 1) / 2);
  return letters.slice(0, most - 1 - tail).join("") + "…" + letters.slice(letters.length - tail).join("");
}

/** A number and its noun. */
export function many(number, one, several = one + "s") {
  return `${count(number)} ${number === 1 ? one : several}`;
}
