/** The statistics that views colour by and the table has columns of. */
import { bytes, count, human, number, share } from './format'
import type { Model } from './model'
import { unpack } from './payload'

export type Scale = 'log' | 'linear' | 'diverging'

export interface Statistic {
  key: string
  label: string
  /** What it is, in a sentence, with its unit. */
  about: string
  scale: Scale
  /** NaN where there is no such number. */
  value(row: number): number
  /** How the values of several tensors become that of a cell; `most` is the one with the most elements. */
  together: 'mean' | 'max' | 'sum' | 'most'
  /** The words that values are indices of, where they are no numbers. */
  words?: string[]
  format(value: number): string
  group: 'values' | 'size' | 'difference' | 'steps'
}

/** All statistics that a report has. */
export function statisticsOf(model: Model): Statistic[] {
  const found: Statistic[] = []
  const { a, difference, over } = model
  const add = (
    key: string,
    label: string,
    about: string,
    scale: Scale,
    value: (row: number) => number,
    format = number,
    together: Statistic['together'] = 'mean',
    group: Statistic['group'] = 'values',
  ) => found.push({ key, label, about, scale, value, together, format, group })
  const column = (key: string) => {
    return (row: number) => (a.read(row) ? a.get(key)[row] : NaN)
  }
  const part = (...keys: string[]) => {
    return (row: number) => {
      if (!a.read(row)) return NaN
      const values = a.get('values')[row]
      return values ? keys.reduce((sum, key) => sum + a.get(key)[row], 0) / values : NaN
    }
  }
  if (difference) {
    const compared = (key: string) => (row: number) => difference.get(key)[row]
    add('relative', 'relative L2', '‖B − A‖ / ‖A‖', 'log', compared('relative'), number, 'mean', 'difference')
    add('share', 'share changed', 'share of the elements that differ', 'linear', compared('share'), share, 'mean', 'difference')
    add('angle', '1 − cosine', '1 − cosine of the angle between A and B', 'log', (row) => 1 - difference.get('cosine')[row], number, 'mean', 'difference')
    add('sqnr', 'SQNR', 'signal to noise of B as A quantised, in dB: 20·log₁₀(‖A‖ / ‖B − A‖)', 'linear', compared('sqnr'), (v) => `${number(v)}${Number.isFinite(v) ? ' dB' : ''}`, 'mean', 'difference')
    add('maxdiff', 'max |B − A|', 'greatest difference of two elements', 'log', compared('max'), number, 'max', 'difference')
    found.push(typeStatistic(model, 'encoding-b', 'encoding of B', typesOfB(model), 'difference'))
  }
  if (over) {
    for (const [key, label, about, scale, format, together] of OVER_STEPS) {
      if (over.keys.includes(key)) add(key, label, about, scale, (row) => over.value(key, row), format, together, 'steps')
    }
    return [...found, ...sizesOf(model)]
  }
  add('std', 'std', 'standard deviation of the finite values', 'log', column('std'))
  add('mean', 'mean', 'mean of the finite values', 'diverging', column('mean'))
  add('linf', 'max |x|', 'greatest magnitude of a finite value', 'log', column('linf'), number, 'max')
  add('rms', 'RMS', 'root of the mean square of the finite values', 'log', (row) => {
    const finite = a.get('values')[row] - a.get('nan')[row] - a.get('posinf')[row] - a.get('neginf')[row]
    return a.read(row) && finite ? a.get('l2')[row] / Math.sqrt(finite) : NaN
  })
  add('l2', 'L2 norm', 'root of the sum of squares of the finite values', 'log', column('l2'))
  add('kurtosis', 'excess kurtosis', 'weight of the tails: 0 of a normal distribution, above 0 with outliers', 'diverging', column('kurtosis'))
  add('outlier', 'max |x| / std', 'greatest magnitude in standard deviations', 'log', (row) => {
    const std = column('std')(row)
    return std > 0 ? a.get('linf')[row] / std : NaN
  }, number, 'max')
  add('zeros', 'zeros', 'share of the values that are 0', 'linear', part('zeros'), share)
  add('nonfinite', 'non-finite', 'count of NaN and ±Inf', 'linear', (row) =>
    a.read(row) ? a.get('nan')[row] + a.get('posinf')[row] + a.get('neginf')[row] : NaN, count, 'sum')
  add('entropy', 'entropy', 'Shannon entropy of the bit patterns, in bits per value', 'linear', column('entropy'), (v) => `${number(v)} bit`)
  if (a.has('gradient')) add('gradient', 'gradient norm', 'L2 norm of the gradient', 'log', (row) => a.get('gradient')[row])
  const { spectra } = model.payload
  if (Object.keys(spectra).length) {
    const figure = (key: 'stable_rank' | 'effective_rank' | 'spectral_norm' | 'tail_exponent' | 'spikes') => (row: number) =>
      spectra[String(row)]?.[key] ?? NaN
    add('stable_rank', 'stable rank', 'Σσ² / σ₁²: how many directions carry the matrix', 'linear', figure('stable_rank'))
    add('effective_rank', 'effective rank', 'exp of the entropy of σ / Σσ', 'linear', figure('effective_rank'))
    add('spectral_norm', 'spectral norm', 'σ₁, the greatest singular value', 'log', figure('spectral_norm'), number, 'max')
    add('tail_exponent', 'tail exponent', 'exponent of a power law fitted to the tail of the eigenvalues σ²', 'linear', figure('tail_exponent'))
    add('spikes', 'spikes', 'singular values above the Marchenko–Pastur edge', 'linear', figure('spikes'), count)
  }
  return [...found, ...sizesOf(model)]
}

/** Columns of a history: key, label, what it is, scale, format, and how several become one. */
const OVER_STEPS: [string, string, string, Scale, (value: number) => string, Statistic['together']][] = [
  ['weight_norm', 'weight norm', 'L2 norm of the finite values', 'log', number, 'mean'],
  ['std', 'std', 'standard deviation of the finite values', 'log', number, 'mean'],
  ['max_abs', 'max |x|', 'greatest magnitude of a finite value', 'log', number, 'max'],
  ['zeros', 'zeros', 'share of the values that are 0', 'linear', share, 'mean'],
  ['nonfinite', 'non-finite', 'count of NaN and ±Inf', 'linear', count, 'sum'],
  ['grad_norm', 'gradient norm', 'L2 norm of the finite values of the gradient', 'log', number, 'mean'],
  ['update_ratio', 'update ratio', 'L2 norm of the update, divided by the norm before it', 'log', number, 'mean'],
]

/** The type of each row of B: its encoding, or its dtype. */
function typesOfB(model: Model): (row: number) => string {
  const form = model.payload.difference as unknown as Record<'encoding' | 'dtype', { words: (string | null)[]; of: never }>
  const [encodings, dtypes] = [unpack(form.encoding.of), unpack(form.dtype.of)]
  return (row) => form.encoding.words[encodings[row]] ?? form.dtype.words[dtypes[row]] ?? ''
}

/** The type of a tensor, its encoding or its dtype, as a statistic whose values are words; the largest type first. */
function typeStatistic(model: Model, key: string, label: string, typeOf: (row: number) => string, group: Statistic['group']): Statistic {
  const sizes = new Map<string, number>()
  for (let row = 0; row < model.size; row++) {
    const word = typeOf(row)
    if (word) sizes.set(word, (sizes.get(word) ?? 0) + model.nbytes[row])
  }
  const words = [...sizes].sort((x, y) => y[1] - x[1]).map(([word]) => word)
  const places = new Map(words.map((word, i) => [word, i]))
  return {
    key,
    label,
    about: 'encoding, or dtype of a plain tensor; of several tensors the one with the most elements',
    scale: 'linear',
    value: (row) => places.get(typeOf(row)) ?? NaN,
    together: 'most',
    words,
    format: (value) => words[value] ?? '–',
    group,
  }
}

function sizesOf(model: Model): Statistic[] {
  const bits = (row: number) => (model.numel[row] ? (8 * model.nbytes[row]) / model.numel[row] : NaN)
  return [
    typeStatistic(model, 'encoding', 'encoding', (row) => model.typeOf(row), 'size'),
    { key: 'bpw', label: 'bits per weight', about: 'bits that are stored for an element, scales included', scale: 'linear', value: bits, together: 'mean', format: number, group: 'size' },
    { key: 'numel', label: 'elements', about: 'count of elements', scale: 'log', value: (row) => model.numel[row], together: 'sum', format: human, group: 'size' },
    { key: 'nbytes', label: 'bytes', about: 'bytes as stored', scale: 'log', value: (row) => model.nbytes[row], together: 'sum', format: bytes, group: 'size' },
  ]
}

/** The value of several tensors together: a mean is one of all their elements. */
export function together(statistic: Statistic, rows: number[], numel: ArrayLike<number>): number {
  if (rows.length === 1) return statistic.value(rows[0])
  if (statistic.together === 'most') return commonest(statistic, rows, numel)
  let sum = 0
  let most = -Infinity
  let n = 0
  for (const row of rows) {
    const value = statistic.value(row)
    if (Number.isNaN(value)) continue
    const weight = statistic.together === 'mean' ? numel[row] : 1
    sum += value * weight
    most = Math.max(most, value)
    n += weight
  }
  if (!n) return NaN
  return statistic.together === 'max' ? most : statistic.together === 'sum' ? sum : sum / n
}

function commonest(statistic: Statistic, rows: number[], numel: ArrayLike<number>): number {
  const elements = new Map<number, number>()
  for (const row of rows) {
    const value = statistic.value(row)
    if (!Number.isNaN(value)) elements.set(value, (elements.get(value) ?? 0) + numel[row])
  }
  let [found, most] = [NaN, -1]
  for (const [value, size] of elements) if (size > most) [found, most] = [value, size]
  return found
}
