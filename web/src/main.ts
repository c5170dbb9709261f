/** The page: reads the data, draws the views, binds the tools that they share. */
import { constantOf } from './colour'
import { choice, fill, h, visible } from './dom'
import { count, plural } from './format'
import { Model } from './model'
import type { Payload } from './payload'
import { State } from './state'
import { HeatMap } from './views/heatmap'
import { Icicle } from './views/icicle'
import { overview } from './views/overview'
import { overSteps } from './views/slider'
import { Ridgelines } from './views/ridgelines'
import { TensorTable } from './views/table'
import { TensorSheet } from './views/tensor'

const element = (id: string) => document.getElementById(id)!
const payload = JSON.parse(element('data').textContent!) as Payload
const model = new Model(payload)
const state = new State(model)

// --- theme ----------------------------------------------------------------------------------------

function themed(theme: string | null): void {
  document.documentElement.dataset.theme = theme ?? (matchMedia('(prefers-color-scheme: dark)').matches ? 'dark' : 'light')
}
let chosen: string | null = null
themed(null)
matchMedia('(prefers-color-scheme: dark)').addEventListener('change', () => {
  if (chosen === null) {
    themed(null)
    state.emit('theme')
  }
})
element('theme').addEventListener('click', () => {
  chosen = document.documentElement.dataset.theme === 'dark' ? 'light' : 'dark'
  themed(chosen)
  state.emit('theme')
})

// --- the head -------------------------------------------------------------------------------------

const title = model.other ? `${model.source.label} → ${model.other.label}` : model.source.label
document.title = `${visible(title)} · torchparams`
fill(element('label'), title)

// --- tools ----------------------------------------------------------------------------------------

const input = element('selector') as HTMLInputElement
const said = element('selected')
let wait = 0
input.addEventListener('input', () => {
  clearTimeout(wait)
  wait = window.setTimeout(() => state.select(input.value), 120)
})
input.addEventListener('keydown', (event) => {
  if (event.key === 'Escape') state.select('')
  else if (event.key === 'Enter') state.select(input.value)
  else return
  event.preventDefault()
})
document.addEventListener('keydown', (event) => {
  if (event.key === '/' && !(event.target as Element).matches('input, select, textarea')) {
    event.preventDefault()
    input.focus()
    input.select()
  }
})

const statistics = element('statistic') as HTMLSelectElement
const groups = { steps: 'At the step', difference: 'Difference of B from A', values: 'Values', size: 'Size' }
for (const [group, label] of Object.entries(groups)) {
  const options = state.statistics.filter((statistic) => statistic.group === group)
  if (options.length) statistics.append(h('optgroup', { label }, ...options.map((each) => h('option', { value: each.key }, each.label))))
}
statistics.addEventListener('change', () => state.choose(statistics.value))
const scale = choice('Scale', [['log', 'log'], ['linear', 'linear']], state.log ? 'log' : 'linear', (value) => {
  state.log = value === 'log'
  state.emit('statistic')
})
const range = choice('Range of colours', [['all', 'overall'], ['role', 'per role']], 'all', (value) => {
  state.perRole = value === 'role'
  state.emit('statistic')
})
element('tools').append(scale, range)
overSteps(state, element('steps'))

function tools(): void {
  if (input.value !== state.selector) input.value = state.selector
  input.setAttribute('aria-invalid', String(state.error !== null))
  const { error } = state
  said.className = error ? 'said error' : 'said'
  if (error) {
    fill(said, `${error.column ? `column ${error.column}: ` : ''}${error.message}${error.hint ? `. ${error.hint}` : ''}`)
  } else {
    fill(said, state.mask === null ? plural(model.size, 'tensor') : `${count(state.selected)} of ${plural(model.size, 'tensor')}`)
  }
  statistics.value = state.statistic.key
  scale.set(state.log ? 'log' : 'linear')
  // Words have no scale, and the same colours everywhere.
  for (const tool of [scale, range]) tool.hidden = state.statistic.words !== undefined
  legend()
}

const MOST_WORDS = 10 // colours that differ

/** The ramp of colours with its ends, the middle, and the unit. */
function legend(): void {
  const { colours, statistic } = state
  if (statistic.words) {
    const words = statistic.words.slice(0, MOST_WORDS).map((word, i) => {
      const swatch = h('i', { class: 'swatch' })
      swatch.style.background = colours(i) ?? ''
      return h('span', { class: 'word' }, swatch, word)
    })
    const more = statistic.words.length - words.length
    fill(element('legend'), ...words, more ? `and ${count(more)} more` : null, h('span', { class: 'about' }, statistic.about))
    return
  }
  const [low, high] = colours.domain
  const steps = 48
  const at = (t: number) => {
    if (colours.kind === 'log') return low * (high / low) ** t
    if (colours.kind === 'symlog') {
      const v = 2 * t - 1
      const constant = constantOf(high)
      return Math.sign(v) * constant * Math.expm1(Math.abs(v) * Math.log1p(high / constant))
    }
    return low + (high - low) * t
  }
  const ramp = h('span', { class: 'ramp', 'aria-hidden': 'true' })
  for (let i = 0; i < steps; i++) {
    const step = h('i')
    step.style.background = colours(at((i + 0.5) / steps)) ?? ''
    ramp.append(step)
  }
  fill(
    element('legend'),
    ...(state.perRole
      ? [h('span', {}, 'least'), ramp, h('span', {}, 'greatest of each role')]
      : [h('span', {}, statistic.format(low)), ramp, h('span', {}, statistic.format(high))]),
    h('span', { class: 'about' }, statistic.about),
  )
}

// --- views ----------------------------------------------------------------------------------------

overview(state, element('overview'))
tools()
state.listen((change) => {
  tools()
  if (change !== 'theme') remember()
})
new HeatMap(state, element('layers-view'))
new TensorTable(state, element('tensors-view'))
let ridgelines: Ridgelines | null = null
const drawRidgelines = () => (ridgelines ??= new Ridgelines(state, element('shapes-view')))
new TensorSheet(state, element('tensor'), (row) => {
  drawRidgelines().showRow(row)
  element('shapes').scrollIntoView()
})
// What is below the first screen is drawn once the first screen stands.
const later = [() => new Icicle(state, element('modules-view')), drawRidgelines]
requestAnimationFrame(() => setTimeout(() => {
  for (const draw of later) draw()
  document.documentElement.dataset.ready = 'all'
}))

// --- the address ----------------------------------------------------------------------------------

/** Keeps the selection, the statistic and the open tensor in the address, so that a link leads to them. */
function remember(): void {
  const parts = new URLSearchParams()
  if (state.selector) parts.set('select', state.selector)
  if (state.statistic !== state.statistics[0]) parts.set('by', state.statistic.key)
  if (state.open !== null) parts.set('tensor', model.names[state.open])
  if (model.over && model.over.at < model.over.steps.length - 1) parts.set('step', String(model.over.step))
  const text = parts.toString()
  try {
    history.replaceState(null, '', text ? `#${text}` : '#')
  } catch {
    // A frame of a notebook has no address of its own.
  }
}

function recall(): void {
  const parts = new URLSearchParams(location.hash.slice(1))
  const by = parts.get('by')
  if (by) state.choose(by)
  const text = parts.get('select')
  if (text) state.select(text)
  const step = Number(parts.get('step') ?? NaN)
  if (model.over && Number.isFinite(step)) state.go(model.over.placeOf(step))
  const row = parts.has('tensor') ? model.names.indexOf(parts.get('tensor')!) : -1
  if (row >= 0) state.show(row)
}
recall()
performance.mark('drawn')

/** For the console: `torchparams.select("**.bias")` gives names. */
Object.assign(window, {
  torchparams: {
    select: (text: string) => model.names.filter(((mask) => (_: string, row: number) => mask[row] === 1)(state.table.select(text))),
    canonical: (text: string) => state.table.canonical(text),
    show: (name: string) => state.show(model.names.indexOf(name)),
    state,
  },
})
