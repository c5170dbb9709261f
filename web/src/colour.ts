/** Colours: one sequential ramp, one diverging, of equal steps to the eye, in both themes. */
import { interpolateRgbBasis } from 'd3-interpolate'
import { scaleDiverging, scaleDivergingSymlog, scaleSequential, scaleSequentialLog, scaleSequentialSymlog } from 'd3-scale'
import type { Statistic } from './statistics'

// From seaborn's "mako" and "icefire": light at the low end in the light theme, dark in the dark one.
const MAKO = ['#0b0405', '#2e1e3c', '#413d7b', '#37659e', '#348fa7', '#40b7ad', '#8bdab2', '#def5e5']
const LOW_COLD = ['#1f77a8', '#5aa3c4', '#a5cddd']
const HIGH_WARM = ['#efc09f', '#dd8452', '#b8472a']

export const isDark = () => document.documentElement.dataset.theme === 'dark'

function sequential(): (t: number) => string {
  // The darkest steps are left out, so that cells stand off the ground.
  const ramp = isDark() ? interpolateRgbBasis(MAKO.slice(1)) : interpolateRgbBasis([...MAKO].reverse().slice(0, 7))
  return (t) => ramp(Math.min(1, Math.max(0, t)))
}

function diverging(): (t: number) => string {
  const middle = isDark() ? '#2b2f36' : '#f1f1ee'
  return interpolateRgbBasis([...LOW_COLD, middle, ...HIGH_WARM])
}

/** A diverging scale that is linear around 0 and logarithmic beyond. */
function symlog(most: number): (value: number) => string {
  const scale = scaleDivergingSymlog<string>([-most, 0, most], diverging())
  // The types leave the constant out.
  return (scale as unknown as { constant(c: number): (value: number) => string }).constant(constantOf(most))
}

/** Where a symlog scale stops being linear. */
export function constantOf(most: number): number {
  return Math.max(most / 1000, 1e-12)
}

export interface Colours {
  (value: number): string | null
  domain: [number, number]
  kind: 'log' | 'linear' | 'diverging' | 'symlog' | 'words'
}

/** Colours for some values: null for a value that is no number. */
export function coloursOf(statistic: Statistic, log: boolean, values: Iterable<number>): Colours {
  const { words } = statistic
  if (words) {
    return Object.assign((value: number) => (Number.isNaN(value) ? null : wordColour(value)), {
      domain: [0, words.length - 1] as [number, number],
      kind: 'words' as const,
    })
  }
  let low = Infinity
  let high = -Infinity
  let positive = Infinity
  for (const value of values) {
    if (!Number.isFinite(value)) continue
    low = Math.min(low, value)
    high = Math.max(high, value)
    if (value > 0) positive = Math.min(positive, value)
  }
  if (low > high) low = high = 0
  if (statistic.scale === 'diverging') {
    const most = Math.max(Math.abs(low), Math.abs(high)) || 1
    const scale = log
      ? symlog(most)
      : scaleDiverging<string>([-most, 0, most], diverging())
    return Object.assign((value: number) => (Number.isNaN(value) ? null : scale(Math.max(-most, Math.min(most, value)))), {
      domain: [-most, most] as [number, number],
      kind: log ? ('symlog' as const) : ('diverging' as const),
    })
  }
  const ramp = sequential()
  if (log && high > 0 && Number.isFinite(positive)) {
    const from = positive === high ? positive / 2 : positive
    const scale = scaleSequentialLog<string>([from, high], ramp)
    // 0 and less have no place on a logarithmic scale.
    return Object.assign((value: number) => (value > 0 ? scale(Math.max(from, Math.min(high, value))) : null), {
      domain: [from, high] as [number, number],
      kind: 'log' as const,
    })
  }
  if (log && low < 0) {
    const scale = scaleSequentialSymlog<string>([low, high], ramp)
    return Object.assign((value: number) => (Number.isNaN(value) ? null : scale(value)), {
      domain: [low, high] as [number, number],
      kind: 'symlog' as const,
    })
  }
  const from = low === high ? Math.min(0, low) : statistic.key === 'zeros' || statistic.key === 'share' ? 0 : low
  const to = high === from ? from + 1 : high
  const scale = scaleSequential<string>([from, to], ramp)
  return Object.assign((value: number) => (Number.isNaN(value) ? null : scale(Math.max(from, Math.min(to, value)))), {
    domain: [from, to] as [number, number],
    kind: 'linear' as const,
  })
}

/** Black or white, whichever is read better on a colour. */
export function inkOn(colour: string): string {
  const [r, g, b] = (colour.match(/[\d.]+/g) ?? ['0', '0', '0']).map(Number)
  const linear = (c: number) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4)
  return 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b) > 0.24 ? '#0d1117' : '#ffffff'
}

/** Colours of words: of types and encodings. */
const WORDS = [
  'rgb(76,120,168)', 'rgb(245,133,24)', 'rgb(84,162,75)', 'rgb(178,121,162)', 'rgb(228,87,86)',
  'rgb(114,183,178)', 'rgb(238,202,59)', 'rgb(157,117,93)', 'rgb(255,157,166)', 'rgb(121,112,110)',
]

export function wordColour(i: number): string {
  return WORDS[i % WORDS.length]
}
