/** Curves over the steps of a training: the logged numbers, and the numbers of one tensor. */
import { type ScaleLinear, scaleLinear, scaleLog } from 'd3-scale'
import { line } from 'd3-shape'
import { axes, frame } from '../chart'
import { choice, fill, h, s } from '../dom'
import { count, number, plural } from '../format'
import { type Numbers, unpack } from '../payload'
import type { State } from '../state'
import type { Point, Steps } from '../steps'

type Scale = 'linear' | 'log'

const SHEET = ['update_ratio', 'weight_norm', 'grad_norm']
/** The scale of curves, which stays from tensor to tensor. */
let scale: Scale = 'log'

interface Curve {
  svg: SVGSVGElement
  /** What the curve leaves out; empty for nothing. */
  note: string
  /** Moves the line of the step that is shown. */
  mark(): void
}

/** A curve over the steps, broken where a value is not finite. A click shows the nearest step. */
function curveOf(state: State, over: Steps, points: Point[], label: string, kind: Scale, [width, height]: [number, number], format = number): Curve {
  const shown = (value: number) => Number.isFinite(value) && (kind === 'linear' || value > 0)
  const drawn = points.filter(([, value]) => shown(value))
  const values = drawn.map(([, value]) => value)
  const chart = frame(width, height, `${label} over the steps`)
  const ends = [over.steps[0] ?? 0, over.steps[over.steps.length - 1] ?? 1, points[0]?.[0] ?? Infinity, points.at(-1)?.[0] ?? -Infinity]
  const [first, last] = [Math.min(ends[0], ends[2]), Math.max(ends[1], ends[3])]
  const x = scaleLinear(first < last ? [first, last] : [first - 0.5, first + 0.5], [0, chart.width])
  let [low, high] = [Math.min(...extent(values)), Math.max(...extent(values))]
  if (!values.length) [low, high] = kind === 'log' ? [0.1, 1] : [0, 1]
  if (low === high) [low, high] = kind === 'log' ? [low / 2, high * 2] : [low - (Math.abs(low) / 2 || 1), high + (Math.abs(high) / 2 || 1)]
  const y = (kind === 'log' ? scaleLog() : scaleLinear()).domain([low, high]).range([chart.height, 2])
  const path = line<Point>(([step]) => x(step), ([, value]) => y(value)).defined(([, value]) => shown(value))
  const mark = s('line', { class: 'reference now', y1: 0, y2: chart.height })
  chart.plot.append(mark, s('path', { class: 'curve', d: path(points) ?? '', 'data-points': drawn.length }))
  if (drawn.length <= 120) {
    for (const [step, value] of drawn) {
      chart.plot.append(s('circle', { class: 'point', cx: x(step), cy: y(value), r: 2.4 }, s('title', {}, `step ${count(step)}: ${format(value)}`)))
    }
  }
  axes(chart, x as ScaleLinear<number, number>, y as never, { x: 'step', y: label }, { x: count, xTicks: 5, yValues: kind === 'log' ? ticksOf(low, high) : undefined })
  chart.svg.addEventListener('click', (event) => {
    const box = chart.plot.getScreenCTM()!
    state.go(over.nearest(x.invert((event.clientX - box.e) / box.a)))
  })
  const move = () => {
    const at = String(x(over.step))
    mark.setAttribute('x1', at)
    mark.setAttribute('x2', at)
    mark.dataset.step = String(over.step)
  }
  move()
  const odd = points.filter(([, value]) => !Number.isFinite(value))
  const low0 = points.length - odd.length - drawn.length
  const notes = [
    odd.length ? `Not finite at ${plural(odd.length, 'step')}, first at ${count(odd[0][0])}.` : '',
    low0 ? `${plural(low0, 'value')} of 0 or less ${low0 === 1 ? 'has' : 'have'} no place on a logarithmic scale.` : '',
  ]
  return { svg: chart.svg, note: notes.filter(Boolean).join(' '), mark: move }
}

/** The least and the greatest of many values. */
function extent(values: number[]): [number, number] {
  let [low, high] = [Infinity, -Infinity]
  for (const value of values) {
    low = Math.min(low, value)
    high = Math.max(high, value)
  }
  return [low, high]
}

/** Values of a logarithmic axis: powers of ten, or the ends and their middle. */
function ticksOf(low: number, high: number): number[] {
  const [first, last] = [Math.ceil(Math.log10(low) - 1e-9), Math.floor(Math.log10(high) + 1e-9)]
  if (last - first < 1) return [low, Math.sqrt(low * high), high]
  const step = Math.ceil((last - first + 1) / 5)
  return Array.from({ length: Math.floor((last - first) / step) + 1 }, (_, i) => 10 ** (first + i * step))
}

/** Curves of the numbers that were logged, one at a time; null where there are none. */
export function loggedCurves(state: State): HTMLElement | null {
  const { over } = state.model
  if (!over || !over.form.numbers.length) return null
  const { numbers } = over.form
  let chosen = Math.max(numbers.findIndex(({ name }) => /loss/i.test(name)), 0)
  let kind: Scale = 'linear'
  let curve: Curve | null = null
  const known = new Map<number, [Numbers, Numbers]>()
  const figure = h('div', {})
  const draw = () => {
    const each = numbers[chosen]
    if (!known.has(chosen)) known.set(chosen, [unpack(each.steps), unpack(each.values)])
    const [steps, values] = known.get(chosen)!
    const points = Array.from(steps, (step, i): Point => [step, values[i]])
    curve = curveOf(state, over, points, each.name, kind, [Math.max(480, Math.min(document.documentElement.clientWidth - 64, 1100)), 200])
    const fewer = each.count > points.length ? `${count(points.length)} of ${plural(each.count, 'value')} are drawn: the least and the greatest of neighbours. ` : ''
    fill(figure, curve.svg as unknown as HTMLElement, fewer || curve.note ? h('p', { class: 'caption' }, `${fewer}${curve.note}`) : null)
  }
  const select = h('select', { 'aria-label': 'Logged number', change: () => {
    chosen = Number(select.value)
    draw()
  } }, ...numbers.map(({ name }, i) => h('option', { value: i }, name)))
  select.value = String(chosen)
  draw()
  state.listen((change) => change === 'step' && curve?.mark())
  return h('div', { class: 'logged', 'data-chart': 'Logged numbers' },
    h('div', { class: 'view-tools' }, h('label', { class: 'field' }, 'Logged ', select), choice<Scale>('Scale of the logged number', [['linear', 'linear'], ['log', 'log']], kind, (value) => {
      kind = value
      draw()
    })),
    figure)
}

/** Curves of one tensor: its updates, its norm, its gradient. */
export function tensorCurves(state: State, row: number): HTMLElement | null {
  const over = state.model.over!
  const keys = SHEET.filter((key) => over.keys.includes(key))
  const { statistic } = state
  if (statistic.group === 'steps' && !keys.includes(statistic.key)) keys.unshift(statistic.key)
  const figure = h('div', {})
  const draw = () => {
    fill(figure, ...keys.flatMap((key) => {
      const each = state.statistics.find((one) => one.key === key)!
      const points = over.curve(key, row)
      if (!points.length) return [h('p', { class: 'caption' }, `${each.label}: not recorded for this tensor.`)]
      const curve = curveOf(state, over, points, each.label, scale, [560, 170], each.format)
      return [curve.svg as unknown as HTMLElement, curve.note ? h('p', { class: 'caption' }, curve.note) : null]
    }))
  }
  draw()
  return h('section', { class: 'chart-block', 'data-chart': 'Over the steps' },
    h('h3', {}, 'Over the steps'),
    h('p', { class: 'caption' }, 'A click shows the nearest step.'),
    h('div', { class: 'block-tools' }, choice<Scale>('Scale of the curves', [['linear', 'linear'], ['log', 'log']], scale, (value) => {
      scale = value
      draw()
    })),
    figure)
}
