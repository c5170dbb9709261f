/** Numbers as people read them. A figure is never shown with more digits than the page holds. */

/** A number in four significant digits. */
export function number(value: number): string {
  if (Number.isNaN(value)) return '–'
  if (!Number.isFinite(value)) return value > 0 ? '∞' : '−∞'
  if (value === 0) return '0'
  const size = Math.abs(value)
  let text: string
  if (Number.isInteger(value) && size < 1e6) text = size.toLocaleString('en')
  else if (size >= 1e-3 && size < 1e5) text = size.toPrecision(4).replace(/(\.\d*?)0+$/, '$1').replace(/\.$/, '')
  else {
    const [mantissa, exponent] = size.toExponential(2).split('e')
    text = `${mantissa.replace(/\.?0+$/, '')}e${Number(exponent)}`
  }
  return (value < 0 ? '−' : '') + text
}

/** A number for a tick of an axis: three significant digits at most. */
export function tick(value: number | { valueOf(): number }): string {
  const v = Number(value)
  if (v === 0) return '0'
  const size = Math.abs(v)
  const text =
    size >= 1e-3 && size < 1e4
      ? String(Number(size.toPrecision(3)))
      : size.toExponential(1).replace(/\.0e/, 'e').replace('e+', 'e')
  return (v < 0 ? '−' : '') + text
}

/** A count, all of its digits. */
export function count(value: number): string {
  return Number.isNaN(value) ? '–' : value.toLocaleString('en', { maximumFractionDigits: 0 })
}

/** A count in three digits: 1.24 B. */
export function human(value: number): string {
  const units: [number, string][] = [[1e12, 'T'], [1e9, 'B'], [1e6, 'M'], [1e3, 'K']]
  for (const [size, unit] of units) if (value >= size * 0.9995) return `${three(value / size)} ${unit}`
  return count(value)
}

/** Bytes in powers of 1024. */
export function bytes(value: number): string {
  const units = ['B', 'KiB', 'MiB', 'GiB', 'TiB', 'PiB']
  let at = 0
  for (; value >= 999.5 && at < units.length - 1; at++) value /= 1024
  return at ? `${three(value)} ${units[at]}` : `${value} B`
}

function three(value: number): string {
  return value >= 99.95 ? value.toFixed(0) : value >= 9.995 ? value.toFixed(1) : value.toFixed(2)
}

/** A share as a percentage; what is there is never 0 %, and what is not all never 100 %. */
export function share(value: number): string {
  if (Number.isNaN(value)) return '–'
  if (value === 0) return '0 %'
  if (value === 1) return '100 %'
  const percent = 100 * value
  if (percent < 1e-6) return '< 0.000001 %'
  if (percent < 0.01) return `${Number(percent.toPrecision(1))} %`
  if (percent > 99.99) return '> 99.99 %'
  return `${percent < 1 ? percent.toFixed(2) : percent < 99 ? percent.toFixed(1) : percent.toFixed(2)} %`
}

export function shape(value: number[] | null): string {
  return value === null ? 'no shape' : value.length ? value.join(' × ') : 'scalar'
}

export function plural(value: number, one: string, many = `${one}s`): string {
  return `${count(value)} ${value === 1 ? one : many}`
}
