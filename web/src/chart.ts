/** Frames of charts: margins, axes and their titles. */
import { type Axis, axisBottom, axisLeft } from 'd3-axis'
import type { AxisScale } from 'd3-axis'
import { select } from 'd3-selection'
import { s } from './dom'
import { tick } from './format'

export interface Frame {
  svg: SVGSVGElement
  plot: SVGGElement
  width: number
  height: number
}

const MARGIN = { top: 24, right: 14, bottom: 36, left: 56 }

/** An empty chart with a name for those who do not see it. */
export function frame(width: number, height: number, label: string): Frame {
  const plot = s('g', { transform: `translate(${MARGIN.left},${MARGIN.top})` })
  const svg = s('svg', { class: 'chart', viewBox: `0 0 ${width} ${height}`, width, height, role: 'img', 'aria-label': label }, plot)
  return { svg, plot, width: width - MARGIN.left - MARGIN.right, height: height - MARGIN.top - MARGIN.bottom }
}

type Any = AxisScale<number>

export function axes(
  { plot, width, height }: Frame,
  x: Any,
  y: Any,
  titles: { x: string; y: string },
  formats: { x?: (value: number) => string; y?: (value: number) => string; xTicks?: number; yTicks?: number; xValues?: number[]; yValues?: number[] } = {},
): void {
  const set = (axis: Axis<number>, format: ((value: number) => string) | undefined, ticks: number, values?: number[]) => {
    axis.ticks(ticks).tickFormat((value) => (format ?? tick)(value)).tickSize(4).tickPadding(5)
    if (values) axis.tickValues(values)
    return axis
  }
  const bottom = s('g', { class: 'axis', transform: `translate(0,${height})` })
  const left = s('g', { class: 'axis' })
  plot.prepend(bottom, left)
  select(bottom).call(set(axisBottom(x), formats.x, formats.xTicks ?? 6, formats.xValues))
  select(left).call(set(axisLeft(y), formats.y, formats.yTicks ?? 4, formats.yValues))
  plot.append(
    s('text', { class: 'axis-title', x: width, y: height + 31, 'text-anchor': 'end' }, titles.x),
    s('text', { class: 'axis-title', x: -8, y: -11, 'text-anchor': 'start' }, titles.y),
  )
}
